"""A bundle's files: written, read, and checked against the uncut model. The cloud shares `reading` and `staging`."""
