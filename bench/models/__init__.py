"""The suite `models`: whole models in tuned configurations, against the released code's."""
