vcl 4.1;

# Varnish as a cache in front of Afterimage, for Varnish 7:
#
#   varnishd -F -a :8080 -f "$PWD/config/varnish.vcl" -s malloc,1g -p http_gzip_support=off
#
# tests/it/fronts.rs runs this very file, with another port. Nothing has to be purged: a new image has a new address
# (?v=), and the plain one is asked after when its freshness is over.
#
# http_gzip_support is on by default: Varnish then asks for gzip on behalf of everybody, keeps only that, and unpacks
# it for whoever can't read it. Browsers would get no brotli, and what is unpacked has a weak ETag that isn't
# Afterimage's. Afterimage codes what gains by it, and Vary keeps the codings apart.

import std;

backend default {
    .host = "127.0.0.1";
    .port = "8000";
    .connect_timeout = 1s;
    # Longer than [redis] response_timeout, so that it is Afterimage who gives up.
    .first_byte_timeout = 10s;
    .between_bytes_timeout = 10s;
    .probe = {
        # Not /readyz: that fails without Redis, and Afterimage goes on with what it has in memory.
        .url = "/healthz";
        .interval = 2s;
        .timeout = 1s;
        .window = 4;
        .threshold = 2;
        # Taken for healthy before the first probe.
        .initial = 2;
    }
}

sub vcl_recv {
    # Only images. /metrics, /readyz and /healthz are not for the public.
    if (req.url !~ "^/((images|placeholders)/|events\?)") {
        return (synth(404));
    }
    # Writes stay on the machine: they go to Afterimage itself, which refuses them from here too, by the
    # X-Forwarded-For that Varnish adds. OPTIONS is for scripts of other origins.
    if (req.method !~ "^(GET|HEAD|OPTIONS)$") {
        return (synth(405));
    }

    # Images are the same for everybody.
    unset req.http.Cookie;
    unset req.http.Authorization;

    # Streams of events are passed on as they come.
    if (req.url ~ "^/events\?") {
        return (pass);
    }

    # The request has one name in both logs.
    if (!req.http.X-Request-Id) {
        set req.http.X-Request-Id = req.xid;
    }

    # Three copies at most of what varies by coding, and not one for each way to write the list.
    # A coding with q=0 is refused.
    unset req.http.X-Coding;
    if (req.http.Accept-Encoding ~ "(?i)(^|[,\s])br\s*(,|$|;\s*q=(1|0\.0*[1-9]))") {
        set req.http.X-Coding = "br";
    }
    if (req.http.Accept-Encoding ~ "(?i)(^|[,\s])gzip\s*(,|$|;\s*q=(1|0\.0*[1-9]))") {
        set req.http.X-Coding = req.http.X-Coding + ",gzip";
    }
    unset req.http.Accept-Encoding;
    if (req.http.X-Coding) {
        set req.http.Accept-Encoding = regsub(req.http.X-Coding, "^,", "");
        unset req.http.X-Coding;
    }

    # While Afterimage answers, a copy is used for ten seconds after its freshness is over, and meanwhile asked after.
    # While it doesn't, for as long as there is one.
    if (std.healthy(req.backend_hint) && req.restarts == 0) {
        set req.grace = 10s;
    } else {
        set req.grace = 2h;
    }
}

sub vcl_backend_fetch {
    if (bereq.url ~ "^/events\?") {
        # Longer than [events] heartbeat.
        set bereq.between_bytes_timeout = 60s;
    }
}

sub vcl_backend_response {
    # Varnish asks with If-None-Match where it has an old copy, and drops that when any answer comes. Better it than
    # an error: this answer is dropped.
    if (beresp.status >= 500 && bereq.http.If-None-Match && !bereq.uncacheable) {
        return (abandon);
    }
    # How long images outlive Afterimage: the time that records live by default ([records] ttl).
    set beresp.grace = 2h;

    # While Redis can't be reached, Afterimage answers with Age. Varnish counts it and would find that nothing is left
    # of max-age=5; but these seconds are meant from now on.
    if (beresp.http.Age && beresp.http.Cache-Control == "public, max-age=5") {
        set beresp.ttl = 5s;
    }
}

sub vcl_backend_error {
    if (bereq.http.If-None-Match && !bereq.uncacheable) {
        return (abandon);
    }
}

sub vcl_synth {
    # What was dropped above. This time the old copy is taken, however old.
    if (resp.status == 503 && req.restarts == 0) {
        return (restart);
    }
    if (resp.status == 405) {
        set resp.http.Allow = "GET, HEAD, OPTIONS";
    }
}

sub vcl_deliver {
    # Where the answer came from (RFC 9211 §2). A copy whose freshness is over has a ttl below zero.
    if (resp.http.Cache-Status) {
        std.collect(resp.http.Cache-Status);
        set resp.http.Cache-Status = resp.http.Cache-Status + ", ";
    }
    if (obj.hits > 0) {
        set resp.http.Cache-Status = resp.http.Cache-Status + "varnish; hit; ttl="
            + std.integer(duration = obj.ttl);
        # How long the store took says nothing of an answer that Varnish had.
        unset resp.http.Server-Timing;
    } else {
        set resp.http.Cache-Status = resp.http.Cache-Status + "varnish; fwd=miss";
    }
    # It belongs to one request and not to its copies.
    set resp.http.X-Request-Id = req.http.X-Request-Id;
    unset resp.http.X-Varnish;
}
