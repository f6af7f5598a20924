{{/* Names and labels. A role is router, worker, etcd or test. */}}

{{- define "perigee.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" (.Release.Name | trunc 32 | trimSuffix "-") .Chart.Name -}}
{{- end -}}
{{- end }}

{{/* Takes (list . ROLE). What selectors match never changes with the chart's version. */}}
{{- define "perigee.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ $root.Chart.Name }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "perigee.labels" -}}
{{- $root := index . 0 -}}
{{ include "perigee.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: {{ $root.Chart.Name }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Takes (list . ROLE). */}}
{{- define "perigee.metadata" -}}
{{- $root := index . 0 -}}
name: {{ include "perigee.fullname" $root }}-{{ index . 1 }}
namespace: {{ $root.Release.Namespace }}
labels:
  {{- include "perigee.labels" . | nindent 2 }}
{{- end }}

{{/* Takes (list . IMAGE), IMAGE being router, worker-cpu or worker-cuda. */}}
{{- define "perigee.image" -}}
{{- $root := index . 0 -}}
{{- printf "%s/%s:%s" $root.Values.image.repository (index . 1) (default $root.Chart.AppVersion $root.Values.image.tag) -}}
{{- end }}

{{/* The host under which clients reach the routers. */}}
{{- define "perigee.routerHost" -}}
{{- printf "%s-router.%s.svc" (include "perigee.fullname" .) .Release.Namespace -}}
{{- end }}

{{- define "perigee.tlsSecret" -}}
{{- default (printf "%s-tls" (include "perigee.fullname" .)) .Values.tls.secretName -}}
{{- end }}
