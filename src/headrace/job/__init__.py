"""A pile of rows on disk: read, answered once each, written in order, whatever happens on the way."""
