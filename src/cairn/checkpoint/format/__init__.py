"""What a checkpoint is on disk: layout, manifest, lineage, reading and verifying."""
