"""What comes in as a model is looked at once, before anything is asked, paid or trained."""
