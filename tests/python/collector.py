"""A receiver of traces (OTLP over gRPC) made from the official opentelemetry-proto package, and what it makes of them."""
import collections
import threading
from concurrent import futures

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

Span = collections.namedtuple("Span", "id parent name service attributes events failed")


def plain(attributes):
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in attributes}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Spans by trace; both ids are hexadecimal, as in a traceparent."""

    def __init__(self):
        self.traces = collections.defaultdict(list)
        self.lock = threading.Lock()
        self.server = grpc.server(futures.ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self.server)
        self.endpoint = f"http://127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self):
        self.server.start()
        return self

    def __exit__(self, *_):
        self.server.stop(None).wait()

    def Export(self, request, context):  # noqa: N802  (the service's own name)
        with self.lock:
            for resource in request.resource_spans:
                service = plain(resource.resource.attributes)
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        self.traces[span.trace_id.hex()].append(Span(
                            span.span_id.hex(), span.parent_span_id.hex(), span.name, service, plain(span.attributes),
                            [event.name for event in span.events], span.status.code == 2))
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self, trace):
        with self.lock:
            return list(self.traces[trace])


def unconnected(spans, root):
    """Spans whose parent is neither among them nor the client's span `root` (empty where the client has none)."""
    known = {span.id for span in spans}
    return [span for span in spans if span.parent not in known and span.parent != root]
