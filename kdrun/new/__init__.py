"""`kdrun new`: scaffolds that run at once, for a folder of one's own or for kdrun itself."""
