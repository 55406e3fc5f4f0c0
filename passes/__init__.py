"""Graph rooms: normalize, match (with symbolic and mask), plan, rewrite. Never import kernels."""
