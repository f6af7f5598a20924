{{/* Where the model comes from: the option, the volume, and the container that fills it. */}}

{{/* Which sources are given: one, or a mistake. */}}
{{- define "perigee.modelSources" -}}
{{- $given := dict "pvc" .Values.model.pvc "hostPath" .Values.model.hostPath "init" .Values.model.init.image -}}
{{- $_ := set $given "random" .Values.model.random -}}
{{- $found := list -}}
{{- range $source := list "pvc" "hostPath" "init" "random" -}}
{{- if get $given $source -}}
{{- $found = append $found $source -}}
{{- end -}}
{{- end -}}
{{- join " " $found -}}
{{- end }}

{{/* Value of --model. */}}
{{- define "perigee.model" -}}
{{- $sources := include "perigee.modelSources" . -}}
{{- if contains " " $sources -}}
{{- fail (printf "model: give one of pvc, hostPath, init.image and random, not several (%s)" $sources) -}}
{{- end -}}
{{- if .Values.model.random -}}
random:{{ .Values.model.random | trimPrefix "random:" }}
{{- else if and (not $sources) (eq .Values.model.path "/models") -}}
demo
{{- else -}}
{{ .Values.model.path }}
{{- end -}}
{{- end }}

{{- define "perigee.modelMount" -}}
{{- $sources := include "perigee.modelSources" . }}
{{- if and $sources (ne $sources "random") }}
- name: model
  mountPath: {{ .Values.model.path }}
  readOnly: true
  {{- if and .Values.model.subPath (ne $sources "init") }}
  subPath: {{ .Values.model.subPath }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "perigee.modelVolume" -}}
{{- if .Values.model.pvc }}
- name: model
  persistentVolumeClaim:
    claimName: {{ .Values.model.pvc }}
    readOnly: true
{{- else if .Values.model.hostPath }}
- name: model
  hostPath:
    path: {{ .Values.model.hostPath }}
    type: Directory
{{- else if .Values.model.init.image }}
- name: model
  emptyDir: {}
{{- end }}
{{- end }}

{{- define "perigee.modelInit" -}}
{{- with .Values.model.init }}
{{- if .image }}
initContainers:
  - name: model
    image: {{ .image }}
    {{- with .command }}
    command:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with .args }}
    args:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    env:
      - name: MODEL_PATH
        value: {{ $.Values.model.path }}
      - name: HOME
        value: /tmp
    securityContext:
      {{- include "perigee.containerSecurity" $ | nindent 6 }}
    volumeMounts:
      - name: model
        mountPath: {{ $.Values.model.path }}
      - name: tmp
        mountPath: /tmp
{{- end }}
{{- end }}
{{- end }}
