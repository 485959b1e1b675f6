"""The embedded main job: a toy corpus, toy models, and every command run on them as a user would."""
