"""Commands of `lso` that are no training: one typed function each."""
