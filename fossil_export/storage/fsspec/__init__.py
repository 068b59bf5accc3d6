"""Models and adapters at fsspec's URLs (s3://, gs://, az:// and more): their names, files, and what errors mean."""
