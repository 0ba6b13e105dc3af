"""Who proposes draft tokens, and how many pay."""
