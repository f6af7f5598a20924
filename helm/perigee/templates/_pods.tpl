{{/* What the pods of routers and workers share. */}}

{{/* Pod Security Standard "restricted", and no API token: nothing here talks to Kubernetes. Takes (list . ROLE). */}}
{{- define "perigee.podCommon" -}}
{{- $root := index . 0 -}}
serviceAccountName: {{ include "perigee.fullname" $root }}-{{ index . 1 }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ if kindIs "map" . }}{{ .name }}{{ else }}{{ . }}{{ end }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{- define "perigee.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "perigee.logEnvironment" -}}
- name: PERIGEE_LOG
  value: {{ .Values.log.filter | quote }}
- name: PERIGEE_LOG_FORMAT
  value: json
{{- end }}

{{/* Where traces go. */}}
{{- define "perigee.tracingArguments" -}}
{{- with .Values.tracing -}}
{{- if .endpoint -}}
- --otlp-endpoint={{ .endpoint }}
- --otlp-sample={{ .sample }}
{{- end }}
{{- end }}
{{- end }}

{{/* The registry: one prefix for each release, so that several may share an etcd. */}}
{{- define "perigee.registryArguments" -}}
{{- $etcd := .Values.etcd -}}
{{- $hosts := list -}}
{{- range $etcd.endpoints -}}
{{- if and (hasPrefix "https://" .) (not $etcd.tls.secretName) (not $etcd.bundled) -}}
{{- fail (printf "etcd.endpoints: %s needs the authority of its certificate, etcd.tls.secretName" .) -}}
{{- end -}}
{{- $hosts = append $hosts (regexReplaceAll "^https?://" . "") -}}
{{- end -}}
{{- if $etcd.bundled -}}
{{- $hosts = list (printf "%s-etcd.%s.svc:2379" (include "perigee.fullname" .) .Release.Namespace) -}}
{{- end -}}
- --registry=etcd://{{ join "," $hosts }}/perigee/{{ .Release.Namespace }}/{{ .Release.Name }}
{{- if not $etcd.bundled }}
{{- if $etcd.tls.secretName }}
- --etcd-ca=/etc/perigee/etcd-tls/ca.crt
{{- if $etcd.tls.clientCertificate }}
- --etcd-cert=/etc/perigee/etcd-tls/tls.crt
- --etcd-key=/etc/perigee/etcd-tls/tls.key
{{- end }}
{{- end }}
{{- if $etcd.auth.user }}
- --etcd-user={{ $etcd.auth.user }}
- --etcd-password-file=/etc/perigee/etcd-auth/password
{{- end }}
{{- end }}
{{- end }}

{{- define "perigee.tlsArguments" -}}
{{- if .Values.tls.enabled -}}
- --tls-cert=/etc/perigee/tls/tls.crt
- --tls-key=/etc/perigee/tls/tls.key
- --tls-ca=/etc/perigee/tls/ca.crt
{{- end }}
{{- end }}

{{- define "perigee.mounts" -}}
{{- include "perigee.modelMount" . }}
{{- if .Values.tls.enabled }}
- name: tls
  mountPath: /etc/perigee/tls
  readOnly: true
{{- end }}
{{- if not .Values.etcd.bundled }}
{{- if .Values.etcd.tls.secretName }}
- name: etcd-tls
  mountPath: /etc/perigee/etcd-tls
  readOnly: true
{{- end }}
{{- if .Values.etcd.auth.user }}
- name: etcd-auth
  mountPath: /etc/perigee/etcd-auth
  readOnly: true
{{- end }}
{{- end }}
- name: tmp
  mountPath: /tmp
{{- end }}

{{- define "perigee.tlsVolume" -}}
{{- if .Values.tls.enabled }}
- name: tls
  secret:
    secretName: {{ include "perigee.tlsSecret" . }}
    defaultMode: 0440
{{- end }}
{{- end }}

{{- define "perigee.volumes" -}}
{{- include "perigee.modelVolume" . }}
{{- include "perigee.tlsVolume" . }}
{{- if not .Values.etcd.bundled }}
{{- if .Values.etcd.tls.secretName }}
- name: etcd-tls
  secret:
    secretName: {{ .Values.etcd.tls.secretName }}
    defaultMode: 0440
{{- end }}
{{- if .Values.etcd.auth.user }}
- name: etcd-auth
  secret:
    secretName: {{ .Values.etcd.auth.secretName }}
    defaultMode: 0440
{{- end }}
{{- end }}
- name: tmp
  emptyDir: {}
{{- end }}

{{/* /live answers from the start on, also while a model is loaded; /health is 200 only while work is taken. */}}
{{- define "perigee.probes" -}}
{{- $scheme := ternary "HTTPS" "HTTP" .Values.tls.enabled -}}
startupProbe:
  httpGet:
    path: /live
    port: http
    scheme: {{ $scheme }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 60
livenessProbe:
  httpGet:
    path: /live
    port: http
    scheme: {{ $scheme }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet:
    path: /health
    port: http
    scheme: {{ $scheme }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
{{- end }}

{{/*
Seconds of --grace out of a termination grace period: 30 of them, at most half, are for preStop, last steps and last words.
*/}}
{{- define "perigee.grace" -}}
{{- max (sub (int .) 30) (div (int .) 2) -}}
{{- end }}
