"""What a run did, from its files alone: a summary for the terminal, a page for the browser."""
