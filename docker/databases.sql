CREATE DATABASE mlflow; -- beside the operations store: both keep their schema's version in a table of one name
