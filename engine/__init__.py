"""What helpers.py stands on; knows nothing above it.

Inside, stages > processes > files, progress; stages > fingerprint; training > checkpoints >
processes; duplicates, picture_cache > rows > catalogue, pictures > tables, texts; all > settings,
files, progress. settings, files, progress, tables, catalogue, rows, texts and pictures import no
torch.
"""
