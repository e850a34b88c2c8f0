"""A run: its folder, configuration, trainer, tracking, and how it resumes."""
