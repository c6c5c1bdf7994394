"""The bundle: a directory that holds an optimised model, what it was checked for, and the means to check again."""
