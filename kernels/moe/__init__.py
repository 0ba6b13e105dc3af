"""Experts of a mixture: products over the weights of the experts that each token chose."""
