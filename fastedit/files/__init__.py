"""Files that are read as if an enemy had written them: `sealed` (checksums over every byte, regular files, limits)."""
