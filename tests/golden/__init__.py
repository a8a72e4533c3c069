"""Files and vectors of every format version, read by today's code."""
