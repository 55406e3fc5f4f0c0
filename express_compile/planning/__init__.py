"""Which method runs at a site, and how fast each would be there."""
