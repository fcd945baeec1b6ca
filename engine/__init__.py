"""What helpers.py stands on; knows nothing above it.

Inside, stages > processes > files, progress; stages > fingerprint; training > checkpoints >
processes; duplicates > texts, pictures > rows > catalogue; text_models > texts; all > settings,
files, progress. settings, files, progress, catalogue, rows, texts and pictures import no torch.
"""
