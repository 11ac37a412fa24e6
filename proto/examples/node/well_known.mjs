// Messages of gRPC itself that mora-serve speaks beside its own API: health, and what an error
// carries (https://github.com/grpc/grpc-proto, https://github.com/googleapis/googleapis).

import protobuf from "protobufjs";

export const HEALTH = `
  syntax = "proto3";
  package grpc.health.v1;
  message HealthCheckRequest { string service = 1; }
  message HealthCheckResponse {
    enum ServingStatus { UNKNOWN = 0; SERVING = 1; NOT_SERVING = 2; SERVICE_UNKNOWN = 3; }
    ServingStatus status = 1;
  }
  service Health { rpc Check(HealthCheckRequest) returns (HealthCheckResponse); }
`;

const ERRORS = `
  syntax = "proto3";
  package google.rpc;
  message Any { string type_url = 1; bytes value = 2; }
  message Duration { int64 seconds = 1; int32 nanos = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }
  message RetryInfo { Duration retry_delay = 1; }
  message BadRequest {
    message FieldViolation { string field = 1; string description = 2; }
    repeated FieldViolation field_violations = 1;
  }
`;

const errors = protobuf.parse(ERRORS, { keepCase: true }).root;

/** What a failed call says to programs: `{reason, domain, fields, retrySeconds}`. */
export function errorDetails(error) {
  const said = { reason: "", domain: "", fields: [], retrySeconds: undefined };
  const [bytes] = error.metadata?.get("grpc-status-details-bin") ?? [];
  if (!bytes) return said;
  for (const { type_url, value } of errors.lookupType("google.rpc.Status").decode(bytes).details) {
    const type = errors.lookup(type_url.split("/").pop());
    const detail = type?.decode(value);
    if (type?.name === "ErrorInfo") Object.assign(said, { reason: detail.reason, domain: detail.domain });
    if (type?.name === "BadRequest") said.fields = detail.field_violations.map((v) => v.field);
    if (type?.name === "RetryInfo") {
      const { seconds, nanos } = detail.retry_delay;
      said.retrySeconds = Number(seconds) + nanos / 1e9;
    }
  }
  return said;
}
