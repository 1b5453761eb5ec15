"""Conversations as the model reads them: messages and tools rendered to prompt tokens in GLM's grammar."""
