"""What runs beside the guest: keeping its resident memory within a limit, putting pages together."""
