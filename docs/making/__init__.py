"""The documentation site, and the pages that are made out of the code. `make docs` leads here.

`commands` and `reference` write the made parts of docs/commands.md and docs/python.md, which are committed. `pages`
lays all pages out for Sphinx (`conf`), `check` reads the site that came out, and `links` knows GitHub's rules.
"""
