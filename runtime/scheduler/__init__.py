"""Which tokens the next step computes, and where their keys and values go."""
