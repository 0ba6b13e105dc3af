"""The process itself: threads, OpenMP and malloc."""
