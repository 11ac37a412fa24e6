{{- define "mora-serve.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- define "mora-serve.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains (include "mora-serve.name" .) .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "mora-serve.name" .) | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "mora-serve.selectorLabels" -}}
app.kubernetes.io/name: {{ include "mora-serve.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "mora-serve.labels" -}}
{{ include "mora-serve.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "mora-serve.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "mora-serve.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "mora-serve.image" -}}
{{- $tag := default (printf "%s-%s" .Chart.AppVersion (ternary "cuda" "cpu" .Values.gpu.enabled)) .Values.image.tag }}
{{- printf "%s:%s" .Values.image.repository $tag }}
{{- end }}

{{/* Numbers of YAML are floats to Helm: as JSON they are written as TOML wants them. */}}
{{- define "mora-serve.toml" -}}
{{- range $section, $keys := . }}
[{{ $section }}]
{{- range $key, $value := $keys }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{ end }}
{{- end }}

{{/* What the chart's values say, in the configuration's words; .Values.config adds the rest. */}}
{{- define "mora-serve.config" -}}
{{- $drain := .Values.drainSeconds }}
{{- $server := dict
  "host" "0.0.0.0"
  "port" 50051
  "state" "/var/lib/mora-serve/state"
  "drain_seconds" $drain
  "drain_wait_seconds" (divf $drain 10)
  "log_format" "json"
  "metrics_host" (ternary "0.0.0.0" "127.0.0.1" .Values.metrics.enabled)
  "metrics_port" (ternary .Values.metrics.port -1 .Values.metrics.enabled)
}}
{{- if .Values.http.enabled }}
{{- $_ := set $server "http_host" "0.0.0.0" }}
{{- $_ := set $server "http_port" .Values.http.port }}
{{- end }}
{{- if .Values.tls.secretName }}
{{- $_ := set $server "tls_cert" "/etc/mora-serve/tls/tls.crt" }}
{{- $_ := set $server "tls_key" "/etc/mora-serve/tls/tls.key" }}
{{- else if .Values.tls.allowPlaintext }}
{{- $_ := set $server "allow_plaintext" true }}
{{- else }}
{{- fail "tls.secretName: name a Secret of the type kubernetes.io/tls, or set tls.allowPlaintext where the network itself is protected" }}
{{- end }}
{{- $access := dict }}
{{- if .Values.access.secretName }}
{{- $_ := set $access "file" "/etc/mora-serve/access/access.toml" }}
{{- $_ := set $access "audit" "/var/lib/mora-serve/audit.jsonl" }}
{{- else if .Values.access.allowAnonymous }}
{{- $_ := set $access "allow_anonymous" true }}
{{- else }}
{{- fail "access.secretName: name a Secret with an access file in its key access.toml, or set access.allowAnonymous where others decide who comes this far" }}
{{- end }}
{{- $own := dict
  "server" $server
  "access" $access
  "adapters" (dict "root" "/var/lib/mora-serve/adapters")
  "base" (dict "device" (ternary "cuda" "cpu" .Values.gpu.enabled))
}}
{{- include "mora-serve.toml" (mergeOverwrite (deepCopy .Values.config) $own) | trim }}
{{- end }}

{{/* Kubernetes asks for health itself, but not over TLS. */}}
{{- define "mora-serve.probe" -}}
{{- if .Values.tls.secretName }}
exec:
  command:
    - mora-serve
    - health
    - --timeout=5
    - --tls-ca=/etc/mora-serve/tls/{{ .Values.tls.caKey }}
    - --tls-name={{ default (printf "%s.%s.svc" (include "mora-serve.fullname" .) .Release.Namespace) .Values.tls.serverName }}
timeoutSeconds: 10
{{- else }}
grpc:
  port: 50051
timeoutSeconds: 5
{{- end }}
{{- end }}
