"""Running a decoder layer by layer."""
