"""Temperature, filters and Gumbel-max sampling."""
