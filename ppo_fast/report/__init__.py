"""Pictures of runs, made from their folders: a page of HTML, and tables on a terminal."""
