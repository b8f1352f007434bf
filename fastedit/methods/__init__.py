"""Published methods that are more than one edit, one file each."""
