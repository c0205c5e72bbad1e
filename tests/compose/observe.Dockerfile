# What stands for the images of Prometheus and Jaeger where no registry is reached: programs and places as in
# theirs. From .tools, which `make .tools/prometheus/.built .tools/jaeger/.built` fills.
FROM debian:trixie-slim AS wget
RUN apt-get update -qq && apt-get install -qq -y --no-install-recommends wget

FROM wget AS prometheus
COPY prometheus/prometheus prometheus/promtool /bin/
RUN install -d -o 65534 -g 65534 /prometheus
USER 65534:65534
ENTRYPOINT ["/bin/prometheus"]

FROM wget AS jaeger
COPY jaeger/jaeger /cmd/jaeger/jaeger-linux
USER 10001
ENTRYPOINT ["/cmd/jaeger/jaeger-linux"]
