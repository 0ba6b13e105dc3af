"""One model on several devices: each rank holds a share of its large weights."""
