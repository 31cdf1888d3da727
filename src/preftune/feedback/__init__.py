"""What people said, made comparable before anything is trained on it. No torch here."""
