"""Published methods that are more than an edit, one file a method."""
