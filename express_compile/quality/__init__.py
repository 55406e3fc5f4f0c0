"""How wrong an approximation is: measured for a sample, watched in use."""
