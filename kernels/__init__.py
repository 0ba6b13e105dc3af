"""Ops the compiler cannot write itself: references, dispatch, CPU and Triton implementations."""
