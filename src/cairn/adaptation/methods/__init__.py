"""Operations on adapters, one file each."""
