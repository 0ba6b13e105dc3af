"""What the engine sets before PyTorch is loaded, which test modules may do before they import the engine."""

import pagegraph.compiler.host.openmp_spin  # noqa: F401
