{{- define "afterimage.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "afterimage.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains (include "afterimage.name" .) .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "afterimage.name" .) | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "afterimage.selectorLabels" -}}
app.kubernetes.io/name: {{ include "afterimage.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "afterimage.labels" -}}
{{ include "afterimage.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "afterimage.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "afterimage.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "afterimage.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end }}
{{- end }}

{{/* Tokens are needed to write and, with writes off, to list. Where none is given, the one of the release's secret stays. */}}
{{- define "afterimage.tokens" -}}
{{- if .Values.writes.tokens }}
{{- join "\n" .Values.writes.tokens }}
{{- else }}
{{- $secret := lookup "v1" "Secret" .Release.Namespace (include "afterimage.fullname" .) }}
{{- $kept := dig "data" "write-tokens" "" ($secret | default dict) }}
{{- if $kept }}{{ $kept | b64dec }}{{ else }}{{ randAlphaNum 48 }}{{ end }}
{{- end }}
{{- end }}
