"""The methods of compression, one file each."""
