"""A run as one page: `stages.py` reads run folders, `page.py` writes the HTML."""
