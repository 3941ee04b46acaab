-- beside the operations store: each keeps its schema's version in a table of one name
CREATE DATABASE mlflow;
CREATE DATABASE mlflow_accounts;
CREATE DATABASE feast;
