vcl 4.1;

backend default {
    .host = "{host}";
    .port = "{port}";
}

sub vcl_backend_response {
    # Nothing becomes stale while it is measured.
    set beresp.ttl = 1d;
}
