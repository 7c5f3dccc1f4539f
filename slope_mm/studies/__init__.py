"""Studies: arms that are trained, evaluated and compared with error bars, by one command."""
