"""Pictures (PNG), drawn with matplotlib from figures computed elsewhere."""
