"""Many runs of one experiment: what varies, which are there, carrying out the rest."""
