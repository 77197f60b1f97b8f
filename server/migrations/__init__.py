"""The store's schema in steps, oldest first; a step that was released is never edited."""
