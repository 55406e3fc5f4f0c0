"""What happened, for people: text, tables, pages, pictures."""
